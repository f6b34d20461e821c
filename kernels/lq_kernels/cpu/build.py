"""`python -m lq_kernels.cpu.build`: builds the C++ kernels after the package was installed. See `building`."""

import sys

from lq_kernels.cpu.building import main

if __name__ == "__main__":
    sys.exit(main())
