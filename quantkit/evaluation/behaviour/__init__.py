"""What a file writes, beside what its original writes: loops, reasoning that ends, code, numbers, calls, memory."""
