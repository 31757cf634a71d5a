"""What a layer needs of more than one device: collectives, local sizes, sequence shards."""
