"""Sources to corpora: what the scripts in shards/ share."""
