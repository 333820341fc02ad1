"""What everything stands on: errors, files, random numbers, processes, devices, images as bytes."""
