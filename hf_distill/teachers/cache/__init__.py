"""A teacher's answers on disk, found again by the content of the document they belong to.

keys.py: which document. store.py: bytes by key, in checksummed shards. codecs.py: what those bytes hold; sampling.py:
how draws are made. source.py, settings.py, writer.py: from a dataset to a folder. reader.py: from it into a batch.
fingerprint.py: whose answers they are.
"""
