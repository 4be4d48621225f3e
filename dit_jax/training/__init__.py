"""From a source of pictures to a trained state: encoding, optimizer, step, checkpoints and logs."""
