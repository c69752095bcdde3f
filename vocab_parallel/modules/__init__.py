"""What owns rows: classifier, embedding, both ends of a tied weight; their checkpoints and norm."""
