"""Compiles the kernels for this machine: `python -m granet.native`."""

import logging

from granet.native import available

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(not available())
