"""Loading, chat spans, decoding with capture, reading. Declares the ``Engine`` protocol."""
