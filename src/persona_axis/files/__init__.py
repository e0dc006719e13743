"""Everything that touches the disk: atomic writes, the journal of an unfinished shard, shards.

Import the module you need (``from persona_axis.files.shards import write_shard``); this package imports
nothing by itself, so that ``--help`` never pays for pyarrow.
"""
