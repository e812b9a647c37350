"""FixRes for timm models, distributed: see README.md."""

import os

# OpenMP threads that wait by spinning starve the loader processes on the same cores, and a shared machine's other jobs:
# measured on 2 cores, training the built-in example takes 30 to 45 % less CPU time when they sleep instead.
# Read once, when torch loads its OpenMP library, so it stands before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# But some 20 microseconds of spinning, from one small operation to the next, cost nothing and save waking them each time:
# steps from cached features run 1.3 to 1.8 times as fast as with none (tf_efficientnet_b0 at 320 px, the same 2 cores).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
