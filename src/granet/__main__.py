"""`python -m granet` is the command `granet`."""

import sys

from granet.cli import main

sys.exit(main())
