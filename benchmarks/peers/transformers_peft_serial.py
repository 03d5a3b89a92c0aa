"""transformers + peft, one request at a time, the adapter switched in between."""

from __future__ import annotations

from protocol import serve
from transformers_peft import start_serial

if __name__ == "__main__":
    serve(start_serial)
