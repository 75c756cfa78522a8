"""Training runs of a few hundred elements: a second thread only makes them wait."""

import torch

torch.set_num_threads(1)
