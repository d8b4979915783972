// Runs a model on QEMU's mps2-an386: reads its inputs from a file of the host, and writes its outputs to another, and to a
// third how much memory it took; by semihosting, https://github.com/ARM-software/abi-aa/blob/main/semihosting/semihosting.rst
#include <stddef.h>
#include <stdint.h>

struct array {
    void *bytes;
    uint32_t size;
};

#include "arrays.h"  // given, made: the inputs and outputs; run(): calls the model

enum { OPEN = 0x01, WRITE = 0x05, READ = 0x06, EXIT_EXTENDED = 0x20 };
enum { READ_BINARY = 1, WRITE_BINARY = 5, APPLICATION_EXIT = 0x20026 };
enum { DONE = 0, FAULT = 2, NO_HEAP = 3 };  // exit codes of QEMU

#define UNUSED 0xA5A5A5A5u

extern uint32_t _stack[], _stack_top[], _data[], _data_end[], _data_in_flash[], _bss[], _bss_end[], _ram_end[];
extern uint8_t _flash_bytes[];

static uint8_t *heap_end = (uint8_t *)_bss_end;

static int host(int operation, const void *arguments) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = arguments;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static int file(const char *name, size_t length, uint32_t mode) {
    return host(OPEN, (const uint32_t[]){(uint32_t)name, mode, length});
}

// The number of bytes that could not be read or written.
static int transfer(int operation, int to, const void *bytes, uint32_t size) {
    return host(operation, (const uint32_t[]){(uint32_t)to, (uint32_t)bytes, size});
}

static void end(uint32_t code) {
    for (;;) host(EXIT_EXTENDED, (const uint32_t[]){APPLICATION_EXIT, code});
}

static void fault(void) { end(FAULT); }

// The heap is behind the variables.
void *_sbrk(ptrdiff_t by) {
    uint8_t *was = heap_end;
    if (by > (uint8_t *)_ram_end - was) end(NO_HEAP);
    heap_end += by;
    return was;
}

static void tell_memory(void) {
    const uint32_t *unused = _stack;
    while (*unused == UNUSED) ++unused;
    const uint32_t memory[] = {
        (uint32_t)_flash_bytes,
        (uint32_t)((uint8_t *)_bss_end - (uint8_t *)_data),
        (uint32_t)((uint8_t *)_stack_top - (uint8_t *)unused),
        (uint32_t)(heap_end - (uint8_t *)_bss_end),
    };
    transfer(WRITE, file("memory.bin", 10, WRITE_BINARY), memory, sizeof memory);
}

__attribute__((used)) static void start(void) {
    const int in = file("inputs.bin", 10, READ_BINARY), out = file("outputs.bin", 11, WRITE_BINARY);
    for (size_t i = 0; i < sizeof given / sizeof *given; ++i) transfer(READ, in, given[i].bytes, given[i].size);
    run();
    for (size_t i = 0; i < sizeof made / sizeof *made; ++i) transfer(WRITE, out, made[i].bytes, made[i].size);
    tell_memory();
    end(DONE);
}

__attribute__((naked, used)) static void reset(void) {
    __asm__ volatile(
        "ldr r0, =0xE000ED88\n ldr r1, [r0]\n orr r1, #0xF00000\n str r1, [r0]\n dsb\n isb\n"  // the FPU on
        "ldr r0, =_stack\n ldr r1, =_stack_top\n ldr r2, =0xA5A5A5A5\n"
        "1: cmp r0, r1\n it lo\n strlo r2, [r0], #4\n blo 1b\n"
        "ldr r0, =_data\n ldr r1, =_data_end\n ldr r2, =_data_in_flash\n"
        "2: cmp r0, r1\n ittt lo\n ldrlo r3, [r2], #4\n strlo r3, [r0], #4\n blo 2b\n"
        "ldr r0, =_bss\n ldr r1, =_bss_end\n mov r2, #0\n"
        "3: cmp r0, r1\n it lo\n strlo r2, [r0], #4\n blo 3b\n"
        "b start\n");
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] = {
    _stack_top, reset, fault, fault, fault, fault, fault,
};
