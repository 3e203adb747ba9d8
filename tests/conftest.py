import os

# Tests run side by side, one for each core; their models are too small to share one among threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is fetched from a hub: the tests that speak its protocol start their own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
