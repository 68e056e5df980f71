"""A pretraining on the digits whose steps take milliseconds: 33 of them an epoch."""

TINY_RUN = ("dataset=digits", "batch_size=32", "warmup_epochs=0", "teacher_temp_warmup_epochs=1", "lr=0.01")
TINY_RUN += ("hidden_size=16", "num_attention_heads=2", "num_hidden_layers=2", "out_dim=32", "hidden_dim=16")
TINY_RUN += ("bottleneck_dim=8", "image_size=16", "local_size=8", "num_local_crops=1", "precision=float32")
STEPS_PER_EPOCH = 33
