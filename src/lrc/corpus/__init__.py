"""Building token shards from a mix of sources (`lrc data build`)."""
