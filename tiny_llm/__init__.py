__version__ = "0.1.0"

import sys
from . import bpe as tokenize # its name until 0.1.0, which hid the standard library's module where Python was started in this folder
sys.modules["tiny_llm.tokenize"] = tokenize
