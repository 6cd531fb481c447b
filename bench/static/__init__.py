"""The benchmark ``python -m bench compile``, which reads what the compiler made of every kernel, without a GPU."""
