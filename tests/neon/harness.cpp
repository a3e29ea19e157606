// Runs the ARM kernels for remote.py. It is linked statically with the whole library and executed under qemu.
//
// It reads calls from standard input, one after another, and writes the answers to standard output. All numbers are 64-bit
// little-endian. A call is:
//     isa and kernel name   twice: length, bytes
//     buffers               count; for each: its address in remote.py's process, length, 1 if it must be sent back, bytes
//     pointers in buffers   count; for each: buffer, offset
//     arguments             count; for each: 1 for a float, 2 for a pointer, 0 for another integer; value
// Pointers are addresses in remote.py's process: within one of the buffers, or null. The answer is 1 followed by the buffers to
// send back, or 0 if there is no such kernel.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

extern "C" const char* et_isa_name(int index);
extern "C" void* et_kernel(int index, const char* name);

static void read_all(void* to, size_t size) {
    if (size && fread(to, 1, size, stdin) != size) exit(0);  // remote.py has ended
}

static int64_t read_number() {
    int64_t number;
    read_all(&number, 8);
    return number;
}

static void read_name(char (&name)[128]) {
    int64_t size = read_number();
    if (size >= 128) exit(2);
    read_all(name, size_t(size));
    name[size] = 0;
}

struct Buffer {
    int64_t remote, size, wanted;  // remote: its address in remote.py's process
    uint8_t *memory, *data;        // as allocated; its contents, aligned like the original
};

// Return the local address of a remote one.
static int64_t local_address(const std::vector<Buffer>& buffers, int64_t remote) {
    if (!remote) return 0;
    for (const Buffer& buffer : buffers)
        if (remote >= buffer.remote && remote <= buffer.remote + buffer.size)
            return reinterpret_cast<int64_t>(buffer.data) + remote - buffer.remote;
    exit(3);
}

static void* find(const char* isa, const char* name) {
    for (int i = 0; et_isa_name(i); i++)
        if (!strcmp(et_isa_name(i), isa)) return et_kernel(i, name);
    return nullptr;
}

// The ARM calling convention (AAPCS64) passes integers and pointers in x0 to x7 and then on the stack, 8 bytes each, and floats
// in s0 and s1, whatever their order among the integers: so one function type fits every kernel.
typedef void (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float);

int main() {
    for (;;) {
        char isa[128], name[128];
        read_name(isa);
        read_name(name);
        const int64_t count = read_number();
        std::vector<Buffer> buffers(static_cast<size_t>(count));
        for (Buffer& buffer : buffers) {
            buffer.remote = read_number();
            buffer.size = read_number();
            buffer.wanted = read_number();
            buffer.memory = static_cast<uint8_t*>(malloc(size_t(buffer.size) + 128));
            // kernels use aligned loads: the same place within 64 bytes as the original
            int64_t start = reinterpret_cast<int64_t>(buffer.memory);
            buffer.data = buffer.memory + ((buffer.remote - start) % 64 + 64) % 64;
            read_all(buffer.data, size_t(buffer.size));
        }
        for (int64_t pointers = read_number(); pointers; pointers--) {
            Buffer& buffer = buffers[size_t(read_number())];
            int64_t offset = read_number(), value;
            memcpy(&value, buffer.data + offset, 8);
            value = local_address(buffers, value);
            memcpy(buffer.data + offset, &value, 8);
        }
        int64_t integers[20] = {}, arguments = read_number();
        float floats[2] = {};
        for (int64_t i = 0, integer = 0, real = 0; i < arguments; i++) {
            int64_t kind = read_number(), value = read_number();
            if (integer == 20 || real == 2) exit(4);
            if (kind == 1) memcpy(&floats[real++], &value, 4);
            else integers[integer++] = kind == 2 ? local_address(buffers, value) : value;
        }
        void* address = find(isa, name);
        int64_t found = address != nullptr;
        fwrite(&found, 8, 1, stdout);
        if (found) {
            const int64_t* a = integers;
            reinterpret_cast<Function>(address)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                                a[13], a[14], a[15], a[16], a[17], a[18], a[19], floats[0], floats[1]);
            for (const Buffer& buffer : buffers)
                if (buffer.wanted) fwrite(buffer.data, 1, size_t(buffer.size), stdout);
        }
        fflush(stdout);
        for (const Buffer& buffer : buffers) free(buffer.memory);
    }
}
