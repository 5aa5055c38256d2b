"""For every test of the workspace."""

import os

# The tests' models are so small that threads cost more than they bring, and on a busy machine many times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
