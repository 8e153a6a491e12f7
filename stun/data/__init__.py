"""Calibration and evaluation text. In: files or hub datasets, a checkpoint's tokenizer. Out: rows, token ids, packed samples."""
