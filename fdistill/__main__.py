"""`python -m fdistill`, for launchers such as `accelerate launch -m fdistill distill ...`."""

from fdistill.cli import main

main()
