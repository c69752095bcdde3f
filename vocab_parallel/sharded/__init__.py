"""One call of the loss over a vocab group: arguments checked and agreed on, work, communication."""
