"""Loading, chat spans, decoding with capture, reading. Declares the ``Engine`` and ``LayerTap`` protocols."""
