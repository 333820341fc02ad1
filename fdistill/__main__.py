"""`python -m fdistill`, for launchers such as `accelerate launch -m fdistill distill ...`."""

from fdistill.commands.cli import main

main()
