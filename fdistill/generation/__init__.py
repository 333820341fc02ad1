"""Images from a student, a teacher with its sampler, or any diffusers pipeline."""
