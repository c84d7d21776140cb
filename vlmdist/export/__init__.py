"""From a checkpoint to an ordinary transformers or peft folder that loads without vlmdist, and to a model hub."""
