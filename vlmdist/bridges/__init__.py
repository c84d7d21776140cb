"""Bridges to other evaluation toolkits: lmms-eval and VLMEvalKit."""
