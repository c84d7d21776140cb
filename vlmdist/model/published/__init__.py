"""Published weights in their authors' own form, as models of transformers."""
