"""What a run would take, counted on tensors that have no values: memory, disk, and time from stated rates."""
