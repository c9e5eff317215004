"""One training loop for every diffusion task; `loop.run(task, cfg)` trains, tasks/__init__.py is the contract."""
