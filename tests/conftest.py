"""One thread a test process: the models are tiny, and many small parallel regions cost more than they save."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
