"""A decoding loop for `model.generate(..., custom_generate=fusepass.decode_loop())`.

Hugging Face's loop makes masks and positions anew for every token, and waits for the device to learn whether to stop:
0.7 ms a token on the host. This one (`loop`) calls the same forward with what lies on the device already and chooses
tokens there (`choice`), both as one CUDA graph (`step`), and reads them a few steps late (`steps`). What it can not do
exactly it hands back (`handback`).
"""

from fusepass.decoding.loop import DecodeLoop

decode_loop = DecodeLoop

__all__ = ["DecodeLoop", "decode_loop"]
