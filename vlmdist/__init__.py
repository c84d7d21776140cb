"""vlmdist: fine-tune language and vision-language models on many GPUs, from WebDataset shards."""

__version__ = "0.1.0"
