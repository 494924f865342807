"""Under torchrun: runs one after another, each a command line and the step it is killed at (json, the argument)."""

import json
import sys

import torch

from fused_ops.train.__main__ import main
from tests.train.runs import killed_at

torch.distributed.init_process_group("gloo")
for arguments, step in json.loads(sys.argv[1]):
    with killed_at(step):
        main(arguments)
