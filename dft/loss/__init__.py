"""The DFT loss: functions of tensors, independent of data, trainer and files."""
