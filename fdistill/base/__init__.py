"""What everything stands on: errors, files, random numbers, processes, devices, images as bytes."""

import logging

# diffusers imports bitsandbytes where it is installed, which warns on some CPUs of a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
