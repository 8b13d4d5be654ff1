"""`python -m mpjax`, the command where its script is not on the path."""

import sys

from ._cli import main

sys.exit(main())
