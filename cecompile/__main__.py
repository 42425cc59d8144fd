from cecompile.cli import main

main()
