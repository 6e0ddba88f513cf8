"""The ops in other people's trainers. Each library is imported only when its function is called."""
