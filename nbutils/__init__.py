"""Support package of the course "Llama 3.1 70B with FSDP + QLoRA on two 24 GB GPUs".

The sub-packages are rooms: `common models data patches training adapters planning launching lessons publishing`. Each
says in one sentence what it holds. Imports go down only; `pyproject.toml` holds the floors, and `make lint` looks.
"""
