"""The demo: four fits whose size is chosen by what the machine has time and memory for."""
