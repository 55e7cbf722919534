"""Language adapters on another base without their data (Trans-LoRA): bundles, the two jobs, the command."""
