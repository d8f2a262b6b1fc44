"""One model on the processes that torchrun started: who they are, and linears shared out to them."""
