"""What the adapters use of verl and of checkpoint-engine, and in which versions it is known to be there."""

from __future__ import annotations

from kimi_stack.compat import Hook

TESTED_VERL = "0.9.1"
TESTED_CHECKPOINT_ENGINE = "0.4.2"

_WORKER = "verl.workers.engine_workers:ActorRolloutRefWorker"
_VERL = "verl.checkpoint_engine.base"
VERL_HOOKS: tuple[Hook, ...] = (
    Hook(f"{_VERL}:CheckpointEngineRegistry.register", ("backend",), "the name tent"),
    Hook(f"{_VERL}:CheckpointEngine.prepare", (), "the engine"),
    Hook(
        f"{_VERL}:CheckpointEngine.build_topology",
        ("actor_wg_world_size", "rollout_world_size"),
        "the engine",
    ),
    Hook(f"{_VERL}:CheckpointEngine.init_process_group", (), "the engine"),
    Hook(f"{_VERL}:CheckpointEngine.finalize", (), "the engine"),
    Hook(f"{_VERL}:CheckpointEngine.send_weights", ("weights", "global_steps"), "the engine"),
    Hook(f"{_VERL}:CheckpointEngine.receive_weights", ("global_steps",), "the engine"),
    Hook(f"{_VERL}:CheckpointEngine.wire_format", (), "full tensors"),
    Hook(f"{_VERL}:CheckpointEngineManager.build_process_group", ("rollout",), "the order of the metadata"),
    Hook(f"{_VERL}:CheckpointEngineWorker.execute_checkpoint_engine", ("method",), "the rollout's side"),
    Hook(f"{_WORKER}.execute_checkpoint_engine", ("method",), "the trainer's side"),
    Hook(
        "verl.workers.config.rollout:CheckpointEngineConfig.custom_backend_module",
        (),
        "selecting it from YAML",
    ),
    Hook("verl.workers.config.rollout:CheckpointEngineConfig.engine_kwargs", (), "options from YAML"),
)

_STORE = "checkpoint_engine.p2p_store:P2PStore"
CHECKPOINT_ENGINE_HOOKS: tuple[Hook, ...] = (
    Hook(_STORE, ("device_manager",), "taking its place"),
    Hook(f"{_STORE}.addr", (), "taking its place"),
    Hook(f"{_STORE}.register_named_tensors", ("named_tensors",), "taking its place"),
    Hook(f"{_STORE}.unregister_named_tensors", ("names",), "taking its place"),
    Hook(
        f"{_STORE}.batch_transfer_sync_read",
        ("target_hostname", "buf_ptrs", "remote_ptrs", "lens"),
        "taking its place",
    ),
    Hook("checkpoint_engine.ps:P2PStore", (), "taking its place"),
    Hook("checkpoint_engine.device_utils:get_ip", (), "the address"),
)
