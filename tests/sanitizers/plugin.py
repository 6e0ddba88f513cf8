"""A plugin of pytest, for run.py: the tests run on the CPU kernels that SANITIZED_CPU names."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

import torch

spec = spec_from_file_location("rlhf_fast._cpu", os.environ["SANITIZED_CPU"])
sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])

# The kernels' buffers are for as many threads as openmp.cpp starts, which torch would lower to the number of cores.
torch.set_num_threads(1)
torch.get_num_threads = lambda: int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads = lambda number: None
