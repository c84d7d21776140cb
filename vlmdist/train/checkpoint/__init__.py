"""Checkpoints: whole or not there.

checkpoints/step-000100/
    manifest.json            size and SHA-256 of every other file, step, world size, metrics: written last
    trainable.safetensors    the trained weights, in the step's dtype: what evaluate and export read
    state.json               cursor, tokens, bad samples: ``TrainState``
    run.yaml                 the run file
    deepspeed/               optimizer and loss-scaler state, a file a rank, as DeepSpeed writes and reads them

``save``: the ranks copy their state to host memory in the shadow of the next step (``snapshot``), a thread of each rank
writes and syncs its own files (``writer``), and when the exchange of a step finds that all are there, rank 0 writes the
manifest, renames the staging folder, moves ``latest`` (``folder``).
``load``: the newest checkpoint that verifies, through DeepSpeed's universal checkpoint (``universal``) where the number
of ranks is another one.
"""
