/* A program for gdbserver: it calls `trap` with 1 to 3, which doubles a number at `cell`. */
#include <stdint.h>

volatile uint64_t cell = 0x1122334455667788;

__attribute__((noinline)) void trap(uint64_t number)
{
	cell += number;
	__asm__ volatile("" ::: "memory");
}

int main(void)
{
	for (uint64_t number = 1; number <= 3; number++)
		trap(number);
	return cell == 7 ? 42 : 1;
}
