"""Write fdistill/assets/digits/digits.npz from scikit-learn's copy of the UCI digits (`pip install scikit-learn`)."""

import argparse

import numpy as np
from sklearn.datasets import load_digits

from fdistill.assets import DIGITS_DATA


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    digits = load_digits()
    DIGITS_DATA.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(DIGITS_DATA, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{DIGITS_DATA}: {len(digits.target)} images, {DIGITS_DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
