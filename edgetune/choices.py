"""Lists the values of each setting that takes one of several words."""

RECIPES = ("notes", "raw", "chat")
"""Ways to read notes. notes: front matter dropped, chats trained on the assistant's turns. raw: front matter kept, chats
trained as a whole, in Guanaco's form. chat: only chats are read."""
RECOMPUTE = ("auto", "none", "selective", "full")
"""Activations that are recomputed in the backward pass instead of kept; auto is the fastest choice that fits in memory."""
COMPUTE = ("auto", "bf16", "int8", "fp32")
"""Number formats of products. int8: activations are bf16 where the CPU multiplies it, else fp32, and training multiplies the
frozen weights in 8 bits. auto: int8 where that is faster, else bf16 or fp32."""
HEADS = ("auto", "stored", "int8", "nf4")
"""Forms in which a session holds the head: as stored, in 8 or 4 bits, or (auto) the fastest at next to no cost in quality."""
WEIGHTS = ("auto", "nf4", "int8", "bf16")
"""Forms in which the frozen base's linears are held in memory; weight_forms.py decides which one auto stands for."""
SCHEDULERS = ("auto", "launchd", "systemd", "cron", "task-scheduler")
"""Programs of operating systems that can start a night; auto is launchd on macOS, Task Scheduler on Windows, and elsewhere
systemd's user manager where there is one, else cron."""
MASKS = ("all", "secrets", "none")
"""Extents of masking before training: secrets and personal identifiers, secrets alone, or nothing."""
