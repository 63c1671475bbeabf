"""Gradients without backpropagation: forward gradients beside backprop."""
