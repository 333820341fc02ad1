"""Images from whatever makes them: a student, a teacher, any pipeline of diffusers."""
